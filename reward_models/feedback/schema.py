"""Tables of a project file, version by version."""

APPLICATION_ID = 0x74_65_66_62
"""Marks an SQLite file as ours: "tefb"."""

MIGRATIONS = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE models (id INTEGER PRIMARY KEY, name TEXT NOT NULL, sampling TEXT NOT NULL, UNIQUE (name, sampling));
    CREATE TABLE items (
        id INTEGER PRIMARY KEY,
        source TEXT NOT NULL UNIQUE,  -- where it came from, so that making a project again adds nothing twice
        prompt TEXT NOT NULL,
        category TEXT NOT NULL,
        needed INTEGER NOT NULL,  -- annotators that should rank it
        done INTEGER NOT NULL DEFAULT 0,  -- annotators whose ranking stands
        known TEXT,  -- of a check item: the right ranking
        turn INTEGER NOT NULL,  -- shifts the order in which responses are shown
        priority REAL NOT NULL DEFAULT 0
    );
    CREATE INDEX open_items ON items (priority DESC, id) WHERE done < needed;
    CREATE TABLE responses (
        item INTEGER NOT NULL REFERENCES items,
        place INTEGER NOT NULL,
        text TEXT NOT NULL,
        model INTEGER REFERENCES models,
        finish_reason TEXT NOT NULL,
        PRIMARY KEY (item, place)
    ) WITHOUT ROWID;
    CREATE TABLE annotators (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created REAL NOT NULL);
    CREATE TABLE sessions (
        hash TEXT PRIMARY KEY,
        role TEXT NOT NULL,
        annotator INTEGER REFERENCES annotators,
        created REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE annotations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        item INTEGER NOT NULL REFERENCES items,
        annotator INTEGER NOT NULL REFERENCES annotators,
        action TEXT NOT NULL CHECK (action IN ('rank', 'skip', 'undo')),
        ranking TEXT,  -- places of responses, best first, ties as lists
        flags TEXT NOT NULL,
        scores TEXT NOT NULL,
        comment TEXT NOT NULL,
        shown TEXT NOT NULL,  -- places of responses in the order of the page
        seconds REAL NOT NULL,
        created REAL NOT NULL,
        request TEXT NOT NULL UNIQUE  -- made up by the page: sending it again adds nothing
    );
    CREATE INDEX annotations_of ON annotations (annotator, id);
    CREATE TRIGGER annotations_stay BEFORE UPDATE ON annotations BEGIN SELECT RAISE (ABORT, 'append-only'); END;
    CREATE TRIGGER annotations_last BEFORE DELETE ON annotations BEGIN SELECT RAISE (ABORT, 'append-only'); END;
    CREATE TABLE standing (  -- the annotation of an annotator that counts
        item INTEGER NOT NULL,
        annotator INTEGER NOT NULL,
        annotation INTEGER NOT NULL REFERENCES annotations,
        PRIMARY KEY (item, annotator)
    ) WITHOUT ROWID;
    CREATE INDEX standing_of ON standing (annotator, annotation);
    CREATE TABLE leases (
        item INTEGER NOT NULL REFERENCES items,
        annotator INTEGER NOT NULL REFERENCES annotators,
        session TEXT NOT NULL,
        shown TEXT NOT NULL,
        draft TEXT NOT NULL DEFAULT '{}',
        opened REAL NOT NULL,
        expires REAL NOT NULL,
        PRIMARY KEY (item, annotator)
    ) WITHOUT ROWID;
    """,
)
"""One script per version of the schema; ``PRAGMA user_version`` counts those that a file has been through."""
