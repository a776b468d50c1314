"""The eight scenes, painted in screen space behind and below the toy; compiled by numba."""

from __future__ import annotations

import math

from numba import njit

from dbnb.toybox.scenes import SCENES

BEACH, SNOW, GRASS, DESERT, NIGHT, CITY, ROOM, MOON = range(len(SCENES))


@njit(cache=True)
def _mix(out, r0, g0, b0, r1, g1, b1, t):
    t = min(1.0, max(0.0, t))
    out[0] = r0 + (r1 - r0) * t
    out[1] = g0 + (g1 - g0) * t
    out[2] = b0 + (b1 - b0) * t


@njit(cache=True)
def _fill(out, r, g, b):
    out[0], out[1], out[2] = r, g, b


@njit(cache=True)
def _in_ellipse(u, v, cu, cv, ru, rv):
    return ((u - cu) / ru) ** 2 + ((v - cv) / rv) ** 2 < 1.0


@njit(cache=True)
def backdrop(scene, u, v, horizon, phase, out, tint):
    """Paint one point of a scene: writes its colour to `out` and the light's colour on the toy to `tint`.

    u, v: screen coordinates in [-1, 1], v upwards. horizon: the v where ground meets sky. phase in [0, 1): where the
    landmarks stand. Returns (ambient light, key light, how dark a shadow falls on the ground).
    """
    h = v - horizon  # height above the horizon
    depth = -h / (1.0 + horizon)  # 0 at the horizon, 1 at the picture's lower edge
    swell = math.sin(5.0 * u + 9.0 * v + 6.28 * phase)  # one slow ripple keeps the ground from being flat
    _fill(tint, 1.0, 1.0, 1.0)
    if scene == BEACH:
        if h < 0.0:
            _mix(out, 0.96, 0.89, 0.70, 0.88, 0.76, 0.53, depth + 0.05 * swell)
        elif h < 0.26 + 0.02 * math.sin(8.0 * u + 6.28 * phase):
            _mix(out, 0.35, 0.75, 0.86, 0.08, 0.42, 0.74, h / 0.26)
        else:
            _mix(out, 0.80, 0.92, 0.98, 0.45, 0.74, 0.97, (h - 0.26) / 0.4)
        return 0.46, 0.66, 0.42
    if scene == SNOW:
        if h < 0.0:
            _mix(out, 0.93, 0.96, 0.99, 0.84, 0.90, 0.97, depth + 0.08 * swell)
            return 0.50, 0.60, 0.34
        _mix(out, 0.86, 0.89, 0.93, 0.70, 0.77, 0.86, h / 0.7)
        # Fir trees: a triangle every 0.5 of the width.
        cell = u / 0.5 + phase
        across = abs(cell - math.floor(cell) - 0.5) * 0.5
        if h < 0.42 and across < 0.17 * (1.0 - h / 0.42):
            _fill(out, 0.12, 0.36, 0.28)
        return 0.50, 0.60, 0.34
    if scene == GRASS:
        hill = 0.14 + 0.09 * math.sin(2.6 * u + 6.28 * phase)
        if h < 0.0:
            _mix(out, 0.45, 0.78, 0.28, 0.22, 0.56, 0.14, depth + 0.08 * swell)
        elif h < hill:
            _mix(out, 0.30, 0.62, 0.26, 0.24, 0.52, 0.24, h / hill)
        else:
            _mix(out, 0.78, 0.90, 0.99, 0.42, 0.70, 0.97, (h - 0.1) / 0.6)
            cu = 2.4 * (phase - 0.5)
            if _in_ellipse(u, v, cu, 0.82, 0.34, 0.09) or _in_ellipse(u, v, cu + 0.1, 0.88, 0.18, 0.10):
                _fill(out, 0.98, 0.98, 1.0)
        return 0.46, 0.66, 0.42
    if scene == DESERT:
        if h < 0.0:
            _mix(out, 0.90, 0.58, 0.28, 0.76, 0.40, 0.16, depth + 0.10 * swell)
        else:
            _mix(out, 0.99, 0.88, 0.55, 0.97, 0.66, 0.36, h / 0.7)
            # A table mountain on one side, a cactus on the other.
            m = u - 1.6 * (phase - 0.5)
            if h < 0.30 and abs(m) < 0.62 - 0.5 * h:
                _fill(out, 0.70, 0.30, 0.20)
            c = u + 0.95 * (1.0 if phase < 0.5 else -1.0) * -1.0 + 0.2 * (phase - 0.5)
            if h < 0.52 and abs(c) < 0.07:
                _fill(out, 0.20, 0.45, 0.22)
        _fill(tint, 1.03, 0.98, 0.92)
        return 0.46, 0.66, 0.44
    if scene == NIGHT:
        if h < 0.0:
            _mix(out, 0.13, 0.19, 0.35, 0.07, 0.11, 0.22, depth + 0.08 * swell)
        else:
            _mix(out, 0.15, 0.20, 0.44, 0.03, 0.05, 0.18, h / 0.7)
            if _in_ellipse(u, v, 1.5 * (phase - 0.5), 0.74, 0.15, 0.15):
                _fill(out, 0.99, 0.96, 0.78)
            else:
                su, sv = u / 0.60 + phase, v / 0.34
                iu, iv = math.floor(su), math.floor(sv)
                ju, jv = su - iu - 0.5 - 0.25 * math.sin(7.0 * iv), sv - iv - 0.5
                if (0.60 * ju) ** 2 + (0.34 * jv) ** 2 < 0.0012:
                    _fill(out, 0.9, 0.9, 0.95)
        _fill(tint, 0.93, 0.95, 1.0)
        return 0.46, 0.66, 0.50
    if scene == CITY:
        if h < 0.0:
            _mix(out, 0.52, 0.52, 0.54, 0.38, 0.38, 0.40, depth + 0.05 * swell)
            if depth < 0.10:
                _fill(out, 0.74, 0.73, 0.70)
        else:
            _mix(out, 0.88, 0.84, 0.80, 0.66, 0.74, 0.84, h / 0.7)
            cell = u / 0.52 + phase
            i = math.floor(cell)
            across = cell - i
            height = 0.46 + 0.20 * math.sin(4.0 * i)
            if h < height and 0.05 < across < 0.95:
                _fill(out, 0.45, 0.35, 0.36)
                window_u, window_v = across * 2.0, h / 0.22
                a, b = window_u - math.floor(window_u), window_v - math.floor(window_v)
                if 0.25 < a < 0.75 and 0.3 < b < 0.8:
                    _fill(out, 0.98, 0.86, 0.50)
        return 0.46, 0.64, 0.44
    if scene == ROOM:
        if h < 0.0:
            _mix(out, 0.66, 0.42, 0.24, 0.55, 0.33, 0.17, depth + 0.05 * swell)
        elif h < 0.08:
            _fill(out, 0.97, 0.95, 0.90)
        else:
            _mix(out, 0.80, 0.72, 0.80, 0.72, 0.62, 0.74, h / 0.7)
            w = u - 1.5 * (phase - 0.5)
            if abs(w) < 0.34 and 0.24 < h:
                _fill(out, 0.97, 0.95, 0.90)
                if abs(w) < 0.28 and abs(w) > 0.03 and 0.30 < h:
                    _fill(out, 0.62, 0.84, 0.95)
        _fill(tint, 1.02, 0.99, 0.95)
        return 0.48, 0.60, 0.42
    # MOON
    if h < 0.0:
        _mix(out, 0.70, 0.70, 0.72, 0.58, 0.58, 0.61, depth)
        for k in range(3):
            cu = (phase + 0.37 * k) % 1.0 * 2.4 - 1.2
            cv = horizon - 0.16 - 0.30 * k
            if _in_ellipse(u, v, cu, cv, 0.26, 0.075):
                _fill(out, 0.50, 0.50, 0.54)
    else:
        _fill(out, 0.02, 0.02, 0.05)
        eu = 1.5 * (phase - 0.5)
        if _in_ellipse(u, v, eu, 0.70, 0.22, 0.22):
            _fill(out, 0.20, 0.45, 0.85)
            if _in_ellipse(u, v, eu - 0.05, 0.75, 0.11, 0.07) or _in_ellipse(u, v, eu + 0.08, 0.62, 0.09, 0.05):
                _fill(out, 0.35, 0.70, 0.35)
    return 0.40, 0.70, 0.50
