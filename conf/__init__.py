"""The YAML files of the configuration, and beside them what every package needs to read settings.

The files hold differences from the defaults of the dataclasses, in one folder for each group.
"""
