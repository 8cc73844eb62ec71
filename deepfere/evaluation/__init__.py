"""How good a result is: scores against a truth, and the report that shows them."""
