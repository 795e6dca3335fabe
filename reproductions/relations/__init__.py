"""How the methods of the notes relate to each other: what the notes say, and what is proved."""
