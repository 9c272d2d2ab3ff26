"""What an assignment of formats costs."""
