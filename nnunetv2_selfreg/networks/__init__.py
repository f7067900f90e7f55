"""Networks with an `.encoder` and a `.decoder` like nnU-Net's own: stages, segmentation heads, deep supervision.

They know nothing of trainers and plans; `nnunetv2_selfreg.training.backbones` builds them from plans.
"""
