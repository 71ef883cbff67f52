"""Agents, environments and seeds: grids of runs, and their summary."""
