"""Unlabelled cases: preprocessing them, and folds that say which cases they are."""
