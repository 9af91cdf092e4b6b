"""What a recipe costs before it runs: parameters, and the work of the levers on them."""
