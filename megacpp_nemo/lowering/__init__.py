"""From a recipe to what other systems call its settings."""
