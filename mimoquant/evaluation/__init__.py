"""Quality: how far a candidate's next-token distributions lie from the reference's, streamed layer by layer."""
