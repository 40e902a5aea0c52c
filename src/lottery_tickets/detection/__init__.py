"""Has the ticket settled? Masks, ranks and movement of successive checks, and rules that judge them."""

from lottery_tickets.detection._detection import EarlyBirdDetection, detect_early_bird_convergence
from lottery_tickets.detection._detector import Criterion, DetectorState, EarlyBirdDetector, Verdict
from lottery_tickets.detection._distance import chance_distance, default_threshold
from lottery_tickets.detection._movement import Movement, MovementProbe, MovementState, SampledDistance
from lottery_tickets.detection._rank_correlation import MagnitudeRanks, RanksState

__all__ = [
    "Criterion",
    "DetectorState",
    "EarlyBirdDetection",
    "EarlyBirdDetector",
    "MagnitudeRanks",
    "Movement",
    "MovementProbe",
    "MovementState",
    "RanksState",
    "SampledDistance",
    "Verdict",
    "chance_distance",
    "default_threshold",
    "detect_early_bird_convergence",
]
