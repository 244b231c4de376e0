"""Turns a ScheduledBatch into tokens.  Owns every tensor; makes no scheduling decision."""
