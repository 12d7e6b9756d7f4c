"""Fused operations, each with its plain twin in torch and a test that they agree."""
