"""The check of a machine with a GPU: steps of named cases, each step in a process of its own that is watched."""
