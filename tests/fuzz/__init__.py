"""Random calls of the public interface, valid and hostile: each equals the definition or raises a clear error.

``--kind programs`` drives whole models with threads, checkpoints and in-place heads, against a loop of plain networks.
``make fuzz``, or ``PYTHONPATH=tests python -m fuzz --calls 10000 --seed 0 --seconds 300``. Calls run in a process of
their own, so that one that crashes or hangs is caught; ``--only INDEX`` runs one call again, here.
"""
