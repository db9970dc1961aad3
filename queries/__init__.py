"""All reads of audit_events: filters, pages, totals, exports and the stream."""
