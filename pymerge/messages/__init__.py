"""How messages speak: of arguments as the caller knows them, of numbers, of a few of many names."""
