"""Where other merge tools plug in: mergekit, FusionBench, sd-mecha. docs/integrating.md has the interface.

Each module here imports the tool that it is for, when it is used; nothing else in the package does.
"""
