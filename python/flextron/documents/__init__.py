"""Documents: read from files, folders, datasets and Python's own library, and split into two sides. No torch here."""

from flextron.documents.reading import TEXT_SUFFIXES, Text, has_fields, read_documents
from flextron.documents.splitting import split_documents
from flextron.documents.stdlib import stdlib_documents

__all__ = ["TEXT_SUFFIXES", "Text", "has_fields", "read_documents", "split_documents", "stdlib_documents"]
