"""People who rank responses: a project file, a page, a blind arena, agreement, and an export that training reads.

A *project* is one SQLite file. It holds *items*, each a prompt with K responses, and what *annotators* said of them.
"""
