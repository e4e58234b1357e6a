"""The report over several benchmarks: loading and joining (collect), charts, the page and the pictures."""
