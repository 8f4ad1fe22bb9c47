"""``metagpt-fast bench``: measures a machine and a disk, and predicts from that how long merges take.

``rates`` is what is measured, ``prediction`` the formula (pure; docs/benchmarks.md has it in words), ``work`` the sizes
of merges. ``memory``, ``files`` and ``bus`` measure, ``trial`` merges a small family to check the formula, ``run`` is
the order of it all, ``tables`` prints. ``bench/`` uses ``arrays`` and ``files``, too.
"""
