"""What makes each specimen: ``python -m recipes.build_all`` makes them all again."""
