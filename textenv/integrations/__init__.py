"""Thin adapters to other projects. None of them is a dependency: a module here is imported where its project is."""
