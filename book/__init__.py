"""The book: chapters in MyST Markdown, and what turns them into a web site."""
