"""Who gets which item, what an answer may say, and what becomes of it."""

from collections import Counter

import pytest

from reward_models.feedback.answers import Refused
from reward_models.feedback.project import NewItem, Response
from reward_models.feedback.queue import EVERYONE, Queue


@pytest.fixture
def people(make_project, clock):
    """A queue, and ``(annotator, session)`` of Ann, Bob and Cat; Ann has a second page."""

    def make(**options):
        project = make_project(**options)
        queue = Queue(project, lease_seconds=300, clock=clock)
        with project.write() as database:
            for session in ("ann", "bob", "cat", "ann-2"):
                database.execute("INSERT INTO sessions VALUES (?, 'annotator', NULL, 0)", (session,))
        for session, name in (("ann", "Ann"), ("bob", "Bob"), ("cat", "Cat"), ("ann-2", "Ann")):
            queue.join(session, name)
        return queue, (1, "ann"), (2, "bob"), (3, "cat")

    return make


def answer(queue, person, lease, ranking=None, **fields):
    ranking = [[i] for i in range(len(lease.shown))] if ranking is None else ranking
    request = fields.pop("request", f"request-{person[1]}-{lease.item.id}")
    return queue.submit(lease.item.id, *person, {"ranking": ranking, "request": request, **fields})


def refusal(work):
    with pytest.raises(Refused) as caught:
        work()
    return caught.value.status, caught.value.message


def test_nobody_gets_an_item_that_another_has(people):
    queue, ann, bob, cat = people(items=3)
    assert [queue.next(*person).item.id for person in (ann, bob, cat)] == [1, 2, 3]
    assert [queue.next(*person).item.id for person in (ann, bob, cat)] == [1, 2, 3]  # the same again on reload


def test_a_second_page_of_the_same_person_gets_another_item(people):
    queue, ann, _, _ = people(items=2)
    assert queue.next(*ann).item.id == 1
    assert queue.next(1, "ann-2").item.id == 2
    assert refusal(lambda: queue.open(1, 1, "ann-2"))[0] == 409
    assert refusal(lambda: answer(queue, (1, "ann-2"), queue.next(*ann)))[0] == 409


def test_a_closed_laptop_gives_its_item_back_and_keeps_its_draft(people, clock):
    queue, ann, bob, _ = people(items=1)
    lease = queue.next(*ann)
    queue.save_draft(1, *ann, {"comment": "half done"})
    assert queue.next(*bob) is None
    clock.now += 299
    assert queue.next(*bob) is None
    clock.now += 2
    assert queue.next(*bob).item.id == 1
    assert refusal(lambda: answer(queue, ann, lease))[0] == 410  # Bob has it now
    clock.now += 301
    assert queue.next(*ann).draft == {"comment": "half done"}
    assert answer(queue, ann, lease)


def test_a_page_whose_lease_ended_gets_what_nobody_else_has(people, clock):
    queue, ann, bob, _ = people(items=2)
    assert queue.next(*ann).item.id == 1
    clock.now += 301
    assert queue.next(*bob).item.id == 1
    assert queue.next(*ann).item.id == 2


def test_an_ended_lease_that_nobody_took_is_still_good(people, clock):
    queue, ann, bob, _ = people(items=1)
    lease = queue.next(*ann)
    clock.now += 10_000
    assert answer(queue, ann, lease)
    assert queue.next(*bob) is None


def test_an_ended_lease_of_an_item_that_is_done_is_refused(people, clock):
    queue, ann, bob, _ = people(items=1)
    lease = queue.next(*ann)
    clock.now += 301
    answer(queue, bob, queue.next(*bob))
    status, message = refusal(lambda: answer(queue, ann, lease))
    assert (status, "Go on with the next item" in message) == (410, True)
    assert len(queue.project.annotations()) == 1


def test_an_ended_lease_is_good_while_another_only_looks_at_an_earlier_answer(people, clock):
    queue, ann, bob, _ = people(items=1, needed=2)
    lease = queue.next(*ann)
    answer(queue, bob, queue.next(*bob))
    clock.now += 301
    queue.open(1, *bob)
    assert answer(queue, ann, lease)  # the second of two
    assert [said.annotator for said in queue.project.annotations()] == ["Bob", "Ann"]


def test_a_draft_renews_the_lease(people, clock):
    queue, ann, bob, _ = people(items=1)
    queue.next(*ann)
    for _ in range(5):
        clock.now += 200
        queue.save_draft(1, *ann, {})
    assert queue.next(*bob) is None


def test_a_draft_after_the_lease_ended_does_not_take_the_item_back_from_another(people, clock):
    queue, ann, bob, _ = people(items=1)
    lease = queue.next(*ann)
    clock.now += 301
    others = queue.next(*bob)
    queue.save_draft(1, *ann, {"comment": "still typing"})
    assert refusal(lambda: answer(queue, ann, lease))[0] == 410
    assert refusal(lambda: queue.open(1, *ann))[0] == 410  # a reload does not either
    assert answer(queue, bob, others)
    assert refusal(lambda: answer(queue, ann, lease))[0] == 410
    assert [said.annotator for said in queue.project.annotations()] == ["Bob"]


def test_a_draft_after_the_lease_ended_renews_it_while_nobody_else_has_the_item(people, clock):
    queue, ann, bob, _ = people(items=1)
    queue.next(*ann)
    clock.now += 301
    queue.save_draft(1, *ann, {})
    assert queue.next(*bob) is None
    clock.now += 301
    assert queue.open(1, *ann).item.id == 1
    assert queue.next(*bob) is None


def test_an_item_waits_for_as_many_annotators_as_it_needs(people):
    queue, ann, bob, cat = people(items=1, needed=2)
    leases = [queue.next(*person) for person in (ann, bob, cat)]
    assert [lease and lease.item.id for lease in leases] == [1, 1, None]
    answer(queue, ann, leases[0])
    assert queue.next(*cat) is None
    assert queue.next(*ann) is None
    answer(queue, bob, leases[1])
    assert queue.progress(1) == (1, 1)
    assert queue.progress(3) == (0, 0)


def test_a_skipped_item_goes_to_somebody_else(people):
    queue, ann, bob, _ = people(items=1)
    answer(queue, ann, queue.next(*ann), [], action="skip", comment="not my field")
    assert queue.next(*ann) is None
    assert queue.next(*bob).item.id == 1
    assert [a.action for a in queue.project.annotations()] == ["skip"]


def test_check_items_go_to_everyone_one_in_so_many(people):
    queue, ann, bob, _ = people(items=12, check_every=4)
    checks = [NewItem(f"c{i}", f"check {i}", [Response("x"), Response("y")], needed=EVERYONE) for i in range(2)]
    queue.project.add_items(checks)
    for person in (ann, bob):
        order = []
        for _ in range(8):
            lease = queue.next(*person)
            order.append(lease.item.id > 12)
            answer(queue, person, lease)
        assert order == [False, False, True, False, False, False, True, False]


def test_check_items_that_are_left_come_when_nothing_else_is(people):
    queue, ann, *_ = people(items=1)
    checks = [NewItem(f"c{i}", f"check {i}", [Response("x"), Response("y")], needed=EVERYONE) for i in range(2)]
    queue.project.add_items(checks)
    order = []
    while lease := queue.next(*ann):
        order.append(lease.item.id)
        answer(queue, ann, lease)
    assert order == [1, 2, 3]


def test_the_same_request_again_adds_nothing(people):
    queue, ann, bob, _ = people(items=2)
    lease = queue.next(*ann)
    assert answer(queue, ann, lease) is True
    assert answer(queue, ann, lease) is False
    assert len(queue.project.history()) == 1
    other = queue.next(*bob)
    assert refusal(lambda: answer(queue, bob, other, request="request-ann-1"))[0] == 422


def test_what_is_shown_is_what_is_ranked(people):
    queue, ann, _, _ = people(items=1, k=4)
    lease = queue.next(*ann)
    assert sorted(lease.shown) == [0, 1, 2, 3]
    scores = {"1": {"helpful": 5}}
    answer(queue, ann, lease, [[2], [0, 3], [1]], flags={"1": "harmful"}, scores=scores, comment="so", seconds=3)
    (said,) = queue.project.annotations()
    shown = lease.shown
    assert said.ranking == ((shown[2],), tuple(sorted((shown[0], shown[3]))), (shown[1],))
    assert said.flags == {str(shown[1]): "harmful"}
    assert said.scores == {str(shown[1]): {"helpful": 5}}
    assert (said.comment, said.annotator, said.shown) == ("so", "Ann", shown)


def test_time_is_not_longer_than_the_page_was_open(people, clock):
    queue, ann, _, _ = people(items=1)
    lease = queue.next(*ann)
    clock.now += 7
    answer(queue, ann, lease, seconds=1e9)
    assert queue.project.annotations()[0].seconds == 7


def test_a_reload_does_not_shorten_the_time_and_an_ended_lease_does_not_lengthen_it(people, clock):
    queue, ann, *_ = people(items=2)
    queue.next(*ann)
    clock.now += 50
    lease = queue.next(*ann)
    clock.now += 50
    answer(queue, ann, lease, seconds=1e9)
    queue.next(*ann)
    clock.now += 400  # the lease ended
    lease = queue.next(*ann)
    clock.now += 5
    answer(queue, ann, lease, seconds=1e9)
    assert [said.seconds for said in queue.project.annotations()] == [100, 5]


def test_an_answer_ends_its_lease_and_its_draft(people):
    queue, ann, *_ = people(items=1)
    lease = queue.next(*ann)
    queue.save_draft(1, *ann, {"comment": "half done"})
    answer(queue, ann, lease)
    opened = queue.open(1, 1, "ann-2")  # at once, on another page
    assert opened.draft == {}
    assert opened.standing.ranking == tuple((place,) for place in lease.shown)


def test_a_clock_that_is_set_back_makes_no_negative_time(people, clock):
    queue, ann, _, _ = people(items=1)
    lease = queue.next(*ann)
    clock.now -= 3600
    answer(queue, ann, lease, seconds=5)
    assert queue.project.annotations()[0].seconds == 0


def test_a_correction_is_a_new_row_and_the_last_one_counts(people):
    queue, ann, _, _ = people(items=2, k=2)
    lease = queue.next(*ann)
    answer(queue, ann, lease, [[0], [1]])
    again = queue.open(1, *ann)
    assert again.standing.ranking == tuple((place,) for place in lease.shown)
    answer(queue, ann, again, [[1], [0]], request="correction")
    (said,) = queue.project.annotations()
    assert said.ranking == tuple((place,) for place in reversed(lease.shown))
    assert len(queue.project.history()) == 2
    assert queue.progress(1) == (1, 2)


def test_undo_opens_the_last_answer_again_as_it_was(people):
    queue, ann, bob, _ = people(items=3, k=3)
    for _ in range(2):
        lease = queue.next(*ann)
        answer(queue, ann, lease, [[1], [0, 2]], flags={"2": "nonsense"}, comment="hm")
    queue.next(*ann)  # a third one is open
    assert queue.undo(*ann) == 2
    opened = queue.next(*ann)
    assert opened.item.id == 2
    assert opened.draft == {"ranks": [2, 1, 2], "flags": {"2": "nonsense"}, "scores": {}, "comment": "hm"}
    assert queue.next(*bob) is None  # neither the open ones nor the done one
    assert len(queue.project.annotations()) == 1
    assert queue.undo(*ann) == 1
    assert refusal(lambda: queue.undo(*ann))[0] == 404


def test_who_takes_an_answer_back_goes_on_at_the_page_where_that_was(people):
    queue, ann, *_ = people(items=1)
    lease = queue.next(*ann)
    answer(queue, ann, lease)
    assert queue.undo(1, "ann-2") == 1
    assert queue.next(1, "ann-2").item.id == 1
    assert answer(queue, (1, "ann-2"), lease)


def test_an_item_whose_answer_was_taken_back_waits_for_somebody_again(people, clock):
    queue, ann, bob, _ = people(items=1)
    answer(queue, ann, queue.next(*ann))
    queue.undo(*ann)
    clock.now += 301
    assert queue.next(*bob).item.id == 1


def test_no_name_of_a_request_is_in_the_way_of_an_undo(people):
    queue, ann, bob, _ = people(items=2)
    with queue.project.write() as database:  # numbers with three digits
        database.execute("INSERT INTO sqlite_sequence VALUES ('annotations', 99)")
    answer(queue, ann, queue.next(*ann))
    answer(queue, bob, queue.next(*bob), request="undo-100")
    assert queue.undo(*ann) == 1


def test_each_response_is_shown_first_equally_often(people):
    queue, ann, bob, cat = people(items=30, k=3, needed=3)
    firsts = Counter()
    for person in (ann, bob, cat):
        while lease := queue.next(*person):
            firsts[lease.item.id, lease.shown[0]] += 1
            answer(queue, person, lease)
    assert set(firsts.values()) == {1}  # of three annotators each saw another one first
    assert len(firsts) == 90


def orders(queue, person):
    while lease := queue.next(*person):
        yield lease.shown
        answer(queue, person, lease)


def test_two_responses_are_swapped_from_item_to_item_as_their_turn_says(people):
    queue, ann, *_ = people(items=4, k=2)
    assert list(orders(queue, ann)) == [(0, 1), (1, 0), (0, 1), (1, 0)]


def test_who_follows_whom_is_random_too(people):
    queue, ann, *_ = people(items=30, k=3)
    steps = Counter((second - first) % 3 for first, second, _ in orders(queue, ann))
    assert steps.keys() == {1, 2}  # both ways round


GOOD = {"ranking": [[0], [1], [2]], "request": "request-1"}
SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"ranking": [[0], [1]]}, 422, "a permutation of 0 to 2"),
        ({"ranking": [[0], [1], [1]]}, 422, "a permutation"),
        ({"ranking": [[0], [1], [3]]}, 422, "a permutation"),
        ({"ranking": [[0], [1], [-1]]}, 422, "a permutation"),
        ({"ranking": [[0], [1], [2], []]}, 422, "a permutation"),
        ({"ranking": [0, 1, 2]}, 422, "a permutation"),
        ({"ranking": [[0], [1], [2.0]]}, 422, "a permutation"),
        ({"ranking": [[0], [True], [2]]}, 422, "a permutation"),
        ({"ranking": "012"}, 422, "a permutation"),
        ({"ranking": None}, 422, "a permutation"),
        ({"ranking": [[0], [1], [2]], "action": "skip"}, 422, "ranking"),
        ({"action": "delete"}, 422, "rank or skip"),
        ({"action": ["rank"]}, 422, "rank or skip"),
        ({"flags": {"3": "harmful"}}, 422, "flags"),
        ({"flags": {"0": "boring"}}, 422, "harmful or nonsense"),
        ({"flags": ["harmful"]}, 422, "flags"),
        ({"flags": {"1" * 5_000: "harmful"}}, 422, "flags"),
        ({"scores": {"0": {"helpful": 6}}}, 422, "from 1 to 5"),
        ({"scores": {"0": {"nice": 3}}}, 422, "helpful, accurate, safe"),
        ({"scores": {"0": {"helpful": True}}}, 422, "scores"),
        ({"scores": {"00": {}}}, 422, "scores"),
        ({"comment": "x" * 4_001}, 413, "4000 characters or less, got 4001"),
        ({"comment": SURROGATE}, 422, "comment must be text"),
        ({"comment": 3}, 422, "comment must be text"),
        ({"seconds": -1}, 422, "seconds must be 0 or more"),
        ({"seconds": float("nan")}, 422, "seconds"),
        ({"seconds": "3"}, 422, "seconds"),
        ({"request": None}, 422, "request must be a name"),
        ({"request": "short"}, 422, "request must be a name"),
        ({"request": SURROGATE * 9}, 422, "request must be a name"),
        ({"request": {"a": 1}}, 422, "request must be a name"),
        ({"model": "x"}, 422, "got 'model' too"),
    ],
)
def test_a_malformed_answer_is_refused_and_nothing_is_saved(people, fields, status, says):
    queue, ann, _, _ = people(items=1, k=3)
    queue.next(*ann)
    found, message = refusal(lambda: queue.submit(1, *ann, GOOD | fields))
    assert (found, says in message) == (status, True), message
    assert queue.project.history() == []
    assert queue.submit(1, *ann, GOOD)


def test_an_item_that_was_never_given_is_not_found(people):
    queue, ann, _, _ = people(items=2)
    for number in (2, 99):
        assert refusal(lambda number=number: queue.submit(number, *ann, {"request": "request-1"}))[0] == 404
        assert refusal(lambda number=number: queue.save_draft(number, *ann, {}))[0] == 404
        assert refusal(lambda number=number: queue.open(number, *ann))[0] == 404


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "a\x00b", "a\u202eb", SURROGATE])
def test_a_name_must_be_short_and_visible(people, name):
    queue, *_ = people(items=1)
    assert refusal(lambda: queue.join("ann", name))[0] == 422


def test_the_most_uncertain_item_comes_first(people):
    queue, ann, _, _ = people(items=3)
    with queue.project.write() as database:
        database.execute("UPDATE items SET priority = id")
    assert queue.next(*ann).item.id == 3
