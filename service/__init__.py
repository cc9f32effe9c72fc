"""The REST API and its workers. Never imports the trainer; the API process never imports torch."""
