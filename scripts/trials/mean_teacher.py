"""Mean teachers that docs/unlabelled-data.md reports on: found with `nnUNet_extTrainer=trainers:scripts/trials`."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_selfreg.training.mean_teacher import MeanTeacher


class nnUNetTrainerMeanTeacherWeight0(MeanTeacher, nnUNetTrainer):
    """The average of the weights alone: the unlabelled samples teach nothing."""

    consistency_weight = 0.0


class nnUNetTrainerMeanTeacherWeight1(MeanTeacher, nnUNetTrainer):
    """Ten times the published weight."""

    consistency_weight = 1.0


class nnUNetTrainerMeanTeacherWeight10(MeanTeacher, nnUNetTrainer):
    """A hundred times the published weight."""

    consistency_weight = 10.0


class nnUNetTrainerMeanTeacherWeight100(MeanTeacher, nnUNetTrainer):
    """A thousand times the published weight."""

    consistency_weight = 100.0


class nnUNetTrainerMeanTeacherWeight1000(MeanTeacher, nnUNetTrainer):
    """Ten thousand times the published weight."""

    consistency_weight = 1000.0


class nnUNetTrainerMeanTeacherNoRamp(nnUNetTrainerMeanTeacherWeight10):
    """Weight 10 from the second step on."""

    ramp_up_length = 1e-9


class nnUNetTrainerMeanTeacherLongRamp(nnUNetTrainerMeanTeacherWeight100):
    """Weight 100, reached at the end of the training, as published."""

    ramp_up_length = 1.0


class nnUNetTrainerMeanTeacherSlow(nnUNetTrainerMeanTeacherWeight100):
    """Weight 100, a teacher that follows ten times as slowly."""

    ema_decay = 0.999


class nnUNetTrainerMeanTeacherOneView(nnUNetTrainerMeanTeacherWeight10):
    """Weight 10, the student sees the teacher's view, without noise, as published."""

    def optimise(self, batch: dict) -> dict:
        batch["data"][-len(batch["data_weak"]) :] = batch["data_weak"]
        return super().optimise(batch)


class nnUNetTrainerMeanTeacherDouble(nnUNetTrainerMeanTeacherWeight100):
    """Weight 100, two unlabelled samples for each labelled one."""

    def initialize(self) -> None:
        self.unlabeled_batch_size = 2 * self.configuration_manager.batch_size
        super().initialize()
