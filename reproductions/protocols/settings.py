"""Profiles that are made of settings: arms that are compared with each other, on one task under one recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from reproductions.harness import profiles
from reproductions.harness.runs import Run

Recipe = TypeVar("Recipe")


class Arms(Protocol):
    """What every setting has; ``data`` is the third part of its runs' keys."""

    @property
    def data(self) -> str: ...
    @property
    def arms(self) -> tuple[str, ...]: ...
    @property
    def few(self) -> tuple[str, ...]: ...
    @property
    def first(self) -> int | None: ...


@dataclass(frozen=True)
class Setting(Generic[Recipe]):
    """Arms that are compared with each other; ``data`` is the third part of their keys."""

    data: str
    recipe: Recipe
    arms: tuple[str, ...]
    few: tuple[str, ...] = ()  # further arms, with the profile's first seeds
    first: int | None = None  # how many of the profile's seeds the arms get; None: all


AnySetting = TypeVar("AnySetting", bound=Arms)


@dataclass(frozen=True)
class Config(profiles.Config, Generic[AnySetting]):
    """A profile of settings."""

    settings: tuple[AnySetting, ...]
    few_seeds: int = 3  # of a setting's further arms


def plan(column: str, config: Config[AnySetting]) -> list[Run]:
    """Every run of a profile: setting by setting, arm by arm, seed by seed."""
    return [
        Run(column, config.profile, setting.data, arm, seed)
        for setting in config.settings
        for arm in (*setting.arms, *setting.few)
        for seed in config.seeds[: config.few_seeds if arm in setting.few else setting.first]
    ]


def setting_of(run: Run, config: Config[AnySetting]) -> AnySetting:
    """The setting that a run belongs to."""
    return next(setting for setting in config.settings if setting.data == run.data)
