"""The published name of `training.ppo.export`: python -m training.ppo.export_epd_predictor RUN."""

from training.ppo.export import main

if __name__ == "__main__":
    main()
