"""How long tests wait for something that has to happen, before they call it a hang."""

PATIENCE_S = 600.0
"""So long that no busy machine takes it. It ends a test that hangs; it is no claim about speed."""
