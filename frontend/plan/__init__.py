"""What a module will offer: roles of dims, entry points, states, the choices and the report."""
