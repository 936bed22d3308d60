"""Train the policy with RLOO: sample completions, score them, compute advantages, update the policy and the engines."""
