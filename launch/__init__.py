"""How processes start; knows no model."""
