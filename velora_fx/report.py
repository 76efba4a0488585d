def render(plan): return repr(plan)
