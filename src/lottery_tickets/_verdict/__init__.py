"""What a verdict on a ticket is made of: paired statistics, the decision, controls, trainings."""
