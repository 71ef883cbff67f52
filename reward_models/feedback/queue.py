"""Who ranks what: items are leased to one annotator at a time, and come back when a laptop is closed.

An item waits until as many annotators as it needs have ranked it. A lease lasts some minutes and is renewed while its
page is open; after that the item goes to somebody else, and the draft stays for the one who began. Check items, whose
right ranking is known, go to everyone, one in every few.
"""

import json
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reward_models.feedback.answers import NAME_LIMIT, Answer, Refused, checked_request
from reward_models.feedback.project import Annotation, Item, Project

EVERYONE = 10**6
"""``needed`` of a check item."""


_OTHERS = (  # that have an item and have not answered it yet; who only looks at an earlier answer does not count
    "(SELECT COUNT(*) FROM leases WHERE item = items.id AND annotator <> :annotator AND expires > :now AND NOT "
    "EXISTS (SELECT 1 FROM standing WHERE item = leases.item AND annotator = leases.annotator))"
)


class Lease(NamedTuple):
    """An item at an annotator's page."""

    item: Item
    shown: tuple[int, ...]
    """Places of the responses in the order of the page."""
    draft: Mapping[str, Any]
    """What the page saved last, in the order of the page."""
    standing: Annotation | None
    """What the annotator said before."""


class Queue:
    """Hands out a project's items and takes the answers."""

    def __init__(
        self, project: Project, *, lease_seconds: float = 300.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.project, self.lease_seconds, self.clock = project, lease_seconds, clock
        self._check_every = project.settings.get("check_every", 10)

    def join(self, session: str, name: str) -> None:
        """Give a session its annotator, who may have others.

        Raises:
            Refused: 422 for a name that is empty, too long or not printable.
        """
        name = " ".join(name.split())
        if not 0 < len(name) <= NAME_LIMIT or not name.isprintable():
            raise Refused(
                422, f"a name must have 1 to {NAME_LIMIT} visible characters, got {name[:60]!r}. Give another."
            )
        with self.project.write() as database:
            database.execute("INSERT OR IGNORE INTO annotators (name, created) VALUES (?, ?)", (name, self.clock()))
            database.execute(
                "UPDATE sessions SET annotator = (SELECT id FROM annotators WHERE name = ?) WHERE hash = ?",
                (name, session),
            )

    def next(self, annotator: int, session: str) -> Lease | None:
        """The item that this session has begun, or a new one; None when there is nothing left to rank."""
        now = self.clock()
        with self.project.write() as database:
            begun = database.execute(
                "SELECT item FROM leases WHERE annotator = ? AND session = ? AND expires > ? AND NOT EXISTS "
                "(SELECT 1 FROM standing WHERE item = leases.item AND annotator = leases.annotator) "
                "ORDER BY opened DESC LIMIT 1",
                (annotator, session, now),
            ).fetchone()
            number = begun["item"] if begun else self._choose(database, annotator, now)
            return None if number is None else self._lease(database, number, annotator, session, now)

    def open(self, number: int, annotator: int, session: str) -> Lease:
        """An item that the annotator has answered or begun, to look at or change.

        Raises:
            Refused: 404 for an item that is not theirs, 409 while another of their pages has it, 410 when its lease has
                ended and others have ranked it since.
        """
        now = self.clock()
        with self.project.write() as database:
            lease = database.execute(
                "SELECT session, expires FROM leases WHERE item = ? AND annotator = ?", (number, annotator)
            ).fetchone()
            if lease is None:
                raise Refused(404, f"item {number} is not among those that you have answered.")
            if lease["session"] != session and lease["expires"] > now:
                raise Refused(409, f"item {number} is open on another of your pages. Go on there, or close it.")
            if lease["expires"] <= now and not self._is_open(database, number, annotator, now):
                raise _gone(number)
            return self._lease(database, number, annotator, session, now)

    def _choose(self, database: Any, annotator: int, now: float) -> int | None:
        """An item for an annotator: one that was begun, a check item when it is time, else the first that is open."""
        mine = "NOT EXISTS (SELECT 1 FROM standing WHERE item = items.id AND annotator = :annotator)"
        elsewhere = (  # the same person at another page
            "NOT EXISTS (SELECT 1 FROM leases WHERE item = items.id AND annotator = :annotator AND expires > :now)"
        )
        values = {"annotator": annotator, "now": now}
        answered = database.execute("SELECT COUNT(*) FROM standing WHERE annotator = :annotator", values).fetchone()[0]
        is_check = f"needed = {EVERYONE}"
        time_for_check = answered % self._check_every == self._check_every // 2
        for wanted in (is_check, f"NOT {is_check}", is_check)[0 if time_for_check else 1 :]:
            row = database.execute(
                f"SELECT id FROM items INDEXED BY open_items WHERE done < needed AND {wanted} AND {mine} "
                f"AND {elsewhere} AND done + {_OTHERS} < needed ORDER BY priority DESC, id LIMIT 1",
                values,
            ).fetchone()
            if row:
                return row["id"]
        return None

    def _lease(self, database: Any, number: int, annotator: int, session: str, now: float) -> Lease:
        old = database.execute(
            "SELECT shown, draft, expires, session FROM leases WHERE item = ? AND annotator = ?", (number, annotator)
        ).fetchone()
        item = self.project.item(number)
        assert item is not None
        shown = json.loads(old["shown"]) if old else self._order(database, item)
        database.execute(
            "INSERT INTO leases VALUES (:item, :annotator, :session, :shown, '{}', :now, :expires) "
            "ON CONFLICT DO UPDATE SET session = :session, expires = :expires, "
            "opened = CASE WHEN expires > :now AND session = :session THEN opened ELSE :now END",
            {
                "item": number, "annotator": annotator, "session": session, "shown": json.dumps(shown),
                "now": now, "expires": now + self.lease_seconds,
            },
        )  # fmt: skip
        draft = json.loads(old["draft"]) if old else {}
        return Lease(item, tuple(shown), draft, self.project.standing(number, annotator))

    def _order(self, database: Any, item: Item) -> list[int]:
        """The order in which an item's responses are shown to its next annotator.

        A random order of the item's own, shifted by one for each further annotator, so that each response is first
        equally often. Two responses are swapped instead, as the item's turn says, which is balanced over the items.
        """
        query = "SELECT turn + (SELECT COUNT(*) FROM leases WHERE item = items.id) FROM items WHERE id = ?"
        turn = database.execute(query, (item.id,)).fetchone()[0]
        order = list(range(len(item.responses)))
        if len(order) > 2:
            random.Random(f"{self.project.settings.get('seed', 0)} {item.id}").shuffle(order)
        shift = turn % len(order)
        return order[shift:] + order[:shift]

    def save_draft(self, number: int, annotator: int, session: str, draft: Mapping[str, Any]) -> None:
        """Keep what a page holds so far, and renew its lease, unless that has ended and somebody else has the item.

        Raises:
            Refused: 404 without a lease, 409 while another page of the annotator has it.
        """
        now = self.clock()
        with self.project.write() as database:
            lease = _own_lease(database, number, annotator, session)
            renewed = lease["expires"] > now or self._is_open(database, number, annotator, now)
            expires = now + self.lease_seconds if renewed else lease["expires"]
            database.execute(
                "UPDATE leases SET draft = ?, expires = ? WHERE item = ? AND annotator = ?",
                (json.dumps(draft), expires, number, annotator),
            )

    def submit(self, number: int, annotator: int, session: str, fields: Mapping[str, Any]) -> bool:
        """Add an annotation; it stands from now on. The same request again adds nothing, and returns False.

        Raises:
            Refused: the answer is malformed (422, 413), the item unknown or never leased (404), or its lease has
                ended and others have ranked it since (410).
        """
        now = self.clock()
        with self.project.write() as database:
            request = checked_request(fields.get("request"))
            sent = database.execute("SELECT item, annotator FROM annotations WHERE request = ?", (request,)).fetchone()
            if sent is not None:
                if tuple(sent) != (number, annotator):
                    raise Refused(422, "request must be a name of its own for each answer. Nothing was saved.")
                return False
            lease = _own_lease(database, number, annotator, session)
            shown = json.loads(lease["shown"])
            answer = Answer.checked(fields, len(shown))
            if lease["expires"] <= now and not self._is_open(database, number, annotator, now):
                raise _gone(number)
            added = database.execute(
                "INSERT INTO annotations (item, annotator, action, ranking, flags, scores, comment, shown, seconds, "
                "created, request) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    annotator,
                    answer.action,
                    json.dumps([sorted(shown[i] for i in group) for group in answer.ranking]),
                    json.dumps({str(shown[int(i)]): flag for i, flag in answer.flags.items()}),
                    json.dumps({str(shown[int(i)]): scores for i, scores in answer.scores.items()}),
                    answer.comment,
                    lease["shown"],
                    max(0.0, min(answer.seconds, now - lease["opened"])),
                    now,
                    answer.request,
                ),
            )
            self._stand(database, number, annotator, added.lastrowid)
            database.execute(
                "UPDATE leases SET expires = ?, draft = '{}' WHERE item = ? AND annotator = ?",
                (now, number, annotator),
            )
        return True

    def undo(self, annotator: int, session: str) -> int:
        """Take back the last answer that stands, and lease its item again with that answer as its draft.

        Returns:
            The item.

        Raises:
            Refused: 404 when there is nothing to take back.
        """
        now = self.clock()
        with self.project.write() as database:
            last = database.execute(
                "SELECT annotations.* FROM standing JOIN annotations ON annotations.id = annotation "
                "WHERE standing.annotator = ? ORDER BY annotation DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            if last is None:
                raise Refused(404, "there is no answer of yours to take back.")
            standing = self.project.standing(last["item"], annotator)
            assert standing is not None
            database.execute(
                "INSERT INTO annotations (item, annotator, action, ranking, flags, scores, comment, shown, seconds, "
                "created, request) VALUES (?, ?, 'undo', NULL, '{}', '{}', '', ?, 0, ?, ?)",
                (last["item"], annotator, last["shown"], now, f"undo {last['id']}"),  # a page sends none with a space
            )
            self._stand(database, last["item"], annotator, None)
            database.execute(  # at once, also while another item is open on this page
                "UPDATE leases SET session = ?, draft = ?, opened = ?, expires = ? WHERE item = ? AND annotator = ?",
                (session, json.dumps(as_draft(standing)), now, now + self.lease_seconds, last["item"], annotator),
            )
        return last["item"]

    def answered(self, annotator: int) -> list[dict[str, Any]]:
        """The items that an annotator has answered, the latest first: number, prompt, action, when."""
        query = (
            "SELECT items.id, prompt, action, annotations.created FROM standing "
            "JOIN annotations ON annotations.id = annotation JOIN items ON items.id = standing.item "
            "WHERE standing.annotator = ? ORDER BY annotation DESC"
        )
        return [{**dict(row), "prompt": json.loads(row["prompt"])} for row in self.project.rows(query, annotator)]

    def progress(self, annotator: int) -> tuple[int, int]:
        """``(answered, answered + still open to this annotator)``."""
        ((done,),) = self.project.rows("SELECT COUNT(*) FROM standing WHERE annotator = ?", annotator)
        ((left,),) = self.project.rows(
            "SELECT COUNT(*) FROM items WHERE done < needed AND NOT EXISTS "
            "(SELECT 1 FROM standing WHERE item = items.id AND annotator = ?)",
            annotator,
        )
        return done, done + left

    def _is_open(self, database: Any, number: int, annotator: int, now: float) -> bool:
        """Whether an item whose lease has ended still waits for this annotator's answer, or has one to replace."""
        query = (
            f"SELECT done + {_OTHERS} < needed OR EXISTS "
            "(SELECT 1 FROM standing WHERE item = items.id AND annotator = :annotator) FROM items WHERE id = :item"
        )
        values = {"annotator": annotator, "now": now, "item": number}
        return bool(database.execute(query, values).fetchone()[0])

    def _stand(self, database: Any, number: int, annotator: int, annotation: int | None) -> None:
        """Let an annotation stand, or none, and count the item's rankings again."""
        if annotation is None:
            database.execute("DELETE FROM standing WHERE item = ? AND annotator = ?", (number, annotator))
        else:
            database.execute("INSERT OR REPLACE INTO standing VALUES (?, ?, ?)", (number, annotator, annotation))
        database.execute(
            "UPDATE items SET done = (SELECT COUNT(*) FROM standing JOIN annotations ON annotations.id = annotation "
            "WHERE standing.item = items.id AND action = 'rank') WHERE id = ?",
            (number,),
        )


def as_draft(annotation: Annotation) -> dict[str, Any]:
    """An annotation as its page would save it: by number in the order shown, with ranks from 1."""
    number = {place: str(i) for i, place in enumerate(annotation.shown)}
    ranks = {place: rank for rank, group in enumerate(annotation.ranking, start=1) for place in group}
    return {
        "ranks": [ranks.get(place) for place in annotation.shown],
        "flags": {number[int(place)]: flag for place, flag in annotation.flags.items()},
        "scores": {number[int(place)]: scores for place, scores in annotation.scores.items()},
        "comment": annotation.comment,
    }


def _own_lease(database: Any, number: int, annotator: int, session: str) -> Any:
    lease = database.execute("SELECT * FROM leases WHERE item = ? AND annotator = ?", (number, annotator)).fetchone()
    if lease is None:
        raise Refused(404, f"item {number} was not given to you. Load the page again.")
    if lease["session"] != session:
        raise Refused(409, f"item {number} is open on another of your pages. Go on there, or load this page again.")
    return lease


def _gone(number: int) -> Refused:
    return Refused(
        410,
        f"the time for item {number} ended, and somebody else has it now. Your draft is kept, but is not needed any "
        "more. Go on with the next item.",
    )
