"""Small words that everything uses: types, checks, seeds, files."""
