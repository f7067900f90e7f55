"""Pictures and measures of what a network learned."""
