"""Hydra configuration: groups of YAML files that hold differences from the dataclass defaults."""
