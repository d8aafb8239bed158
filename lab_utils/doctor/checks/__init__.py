"""What is checked: one file a check, each with ``ORDER``, its place in the table, and ``check(machine) -> rows``."""
