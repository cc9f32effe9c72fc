"""Who may use the API and how often: keys, the guard before every route, rate and size limits, browser headers."""
