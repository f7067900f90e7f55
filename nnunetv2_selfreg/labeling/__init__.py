"""Labels of unlabelled scans, by trained models: `nnUNetv2_selfreg pseudo_label`."""
