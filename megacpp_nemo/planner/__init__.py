"""What a recipe costs before it runs: parameters, operations, memory, traffic, and its levers."""
