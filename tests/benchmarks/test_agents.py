"""What the benchmark of agents keeps of its last record."""

from benchmarks.agents import added_to, of_no_machine


def cell(env_id, agent, seed, regret):
    return {"settings": {"env_id": env_id, "agent": agent, "seed": seed}, "figures": {"regret_ratio": regret}}


def test_an_agent_that_is_measured_anew_in_one_world_keeps_its_figures_in_the_other():
    last = [cell("micro", "PPO", 1, 0.1), cell("micro", "PPO", 2, 0.2), cell("micro", "RLOO", 1, 0.3)]
    last.append(cell("assistant", "PPO", 1, 0.4))
    new = [cell("micro", "PPO", 1, 0.5)]
    assert added_to(last, new) == [last[2], last[3], new[0]]


def test_a_record_names_no_folder_of_the_machine():
    settings = {"agent": "PPO", "evaluated": {"language model 'mine'": "/a/folder"}, "environment": {"x": "/b"}}
    assert of_no_machine(settings) == {"agent": "PPO"}
