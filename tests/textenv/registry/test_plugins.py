"""Packages that register ids of their own on `import textenv`: dist-infos on a path, in processes of their own."""

import subprocess
import sys
import textwrap

import pytest

REGISTER = """
    textenv.register_reward_model("{name}-words", "{name}:words")
    textenv.register("{name}/Words-v0", prompts="micro", reference="micro-reference", reward_model="{name}-words",
                     max_prompt_tokens=4, max_new_tokens=4)
"""


@pytest.fixture
def site(tmp_path):
    """Installs a package: its module and the metadata that names its plug-in."""

    def install(name: str, module: str, entry: str | None = None) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(module))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[textenv.plugins]\n{name} = {entry or name + ':register'}\n")

    install.folder = tmp_path  # type: ignore[attr-defined]
    return install


def run(site, code: str, *flags: str) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.append({str(site.folder)!r})\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)


def good(name: str) -> str:
    body = textwrap.indent(textwrap.dedent(REGISTER.format(name=name)), "    ")
    return f"def words(prompts, completions): return [1.0] * len(prompts)\ndef register():\n    import textenv\n{body}"


def test_a_plug_in_registers_an_id_that_gymnasium_finds(site):
    site("good", good("good"))
    done = run(
        site,
        """
        import gymnasium, textenv
        spec = gymnasium.envs.registration._find_spec("textenv:good/Words-v0")
        assert textenv.reward_model(spec.kwargs["reward_model"])(["a"], ["b"]) == [1.0]
        """,
        "-W",
        "error",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["import good, textenv", "import textenv, good"])
def test_a_plug_in_works_in_either_order_of_import(site, order):
    site("good", good("good"))
    done = run(site, f"{order}\nassert 'good/Words-v0' in textenv.registered_ids()", "-W", "error")
    assert done.returncode == 0, done.stderr


def test_a_module_that_imports_textenv_at_its_top_is_told_to_keep_its_plug_in_elsewhere(site):
    site("top", "import textenv\n" + good("top"))
    found = "\nassert 'top/Words-v0' in textenv.registered_ids()"
    assert run(site, "import textenv" + found, "-W", "error").returncode == 0
    done = run(site, "import top, textenv")
    assert "the function must stand in a module of its own" in done.stderr
    site("apart", "import textenv", "apart_plugin:register")
    (site.folder / "apart_plugin.py").write_text("import textenv\n" + good("apart"))
    done = run(site, "import apart, textenv\nassert 'apart/Words-v0' in textenv.registered_ids()")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "entry", "reason"),
    [
        ("1 / 0", None, "ZeroDivisionError: division by zero"),
        ("def register(): raise SystemExit(3)", None, "SystemExit: 3"),
        ("x = 1", None, "AttributeError"),
        ("", "not_there:register", "ModuleNotFoundError"),
        ("def register(count): pass", None, "TypeError"),
        (
            "def register():\n import textenv\n textenv.register_prompts('half', ['a'])\n"
            " textenv.register('half/Half-v0', prompts='half', reference='r', reward_model='m', max_prompt_tokens=0,"
            " max_new_tokens=1)",
            None,
            "ValueError: max_prompt_tokens must be 1 or more",
        ),
    ],
    ids=["import", "exit", "attribute", "module", "arguments", "registration"],
)
def test_a_broken_plug_in_is_named_in_a_warning_and_stops_neither_the_import_nor_the_others(
    site, module, entry, reason
):
    site("abroken", module, entry)  # entry points come in the order of their packages
    site("good", good("good"))
    done = run(
        site,
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import textenv
        assert len(caught) == 1, caught
        print(caught[0].message)
        assert "good/Words-v0" in textenv.registered_ids()
        assert "textenv/Micro-v0" in textenv.registered_ids()
        assert "half" not in textenv.registry.registered_sources("prompts")
        """,
    )
    assert done.returncode == 0, done.stderr
    assert f"'abroken' (='{entry or 'abroken:register'}') failed" in done.stdout
    assert reason in done.stdout


def test_importing_the_package_loads_nothing_heavy_with_a_plug_in_too(site):
    site("good", good("good"))
    done = run(
        site,
        """
        import textenv
        heavy = {"torch", "transformers", "stable_baselines3", "yaml", "datasets", "rich", "tyro"} & set(sys.modules)
        assert not heavy, heavy
        """,
    )
    assert done.returncode == 0, done.stderr
