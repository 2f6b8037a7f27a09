"""How well it does: pictures. Needs what the extra `eval` brings."""
