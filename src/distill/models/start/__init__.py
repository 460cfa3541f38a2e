"""A student that starts well: made from its teacher in closed form and fitted layer by layer."""
