"""The camera: sphere tracing of a toy's parts over a painted scene, compiled by numba.

Distances and smooth unions follow Quilez, "Distance functions" (iquilezles.org/articles/distfunctions); the tracing
follows Hart, "Sphere tracing", 1996. Everything is float64 and single-threaded per picture, without fast-math, so
that one set of arguments gives one picture.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from dbnb.toybox.backdrops import backdrop
from dbnb.toybox.toys import (
    ACCENT,
    BLACK,
    BODY,
    BOX,
    CAPSULE,
    CYLINDER_Y,
    CYLINDER_Z,
    ELLIPSOID,
    EYE,
    GLASS,
    LAMP,
    TORUS_Z,
)

_BLEND = 0.07  # how softly body parts grow together
_TOP = 2.0  # nothing of a toy is higher than this, nor further than _RADIUS from its axis
_RADIUS = 1.15
_LOOK_AT = 0.80
_DISTANCE = 4.6
_TAN_HALF_FOV = 0.262


@njit(cache=True)
def _part(row, x, y, z):
    """Signed distance from a point to one part."""
    shape = int(row[0])
    if row[2] > 0.5:
        z = abs(z)
    if shape == CAPSULE:
        ax, ay, az = row[3], row[4], row[5]
        bx, by, bz = row[6] - ax, row[7] - ay, row[8] - az
        px, py, pz = x - ax, y - ay, z - az
        bb = bx * bx + by * by + bz * bz
        t = 0.0
        if bb > 0.0:
            t = min(1.0, max(0.0, (px * bx + py * by + pz * bz) / bb))
        dx, dy, dz = px - t * bx, py - t * by, pz - t * bz
        return math.sqrt(dx * dx + dy * dy + dz * dz) - (row[9] + t * (row[10] - row[9]))
    px, py, pz = x - row[3], y - row[4], z - row[5]
    if shape == ELLIPSOID:
        kx, ky, kz = px / row[6], py / row[7], pz / row[8]
        k0 = math.sqrt(kx * kx + ky * ky + kz * kz)
        kx, ky, kz = kx / row[6], ky / row[7], kz / row[8]
        k1 = math.sqrt(kx * kx + ky * ky + kz * kz)
        if k1 < 1e-9:
            return -min(row[6], min(row[7], row[8]))
        return k0 * (k0 - 1.0) / k1
    if shape == BOX:
        r = row[9]
        qx, qy, qz = abs(px) - row[6] + r, abs(py) - row[7] + r, abs(pz) - row[8] + r
        ox, oy, oz = max(qx, 0.0), max(qy, 0.0), max(qz, 0.0)
        return math.sqrt(ox * ox + oy * oy + oz * oz) + min(max(qx, max(qy, qz)), 0.0) - r
    if shape == CYLINDER_Y or shape == CYLINDER_Z:
        r = row[8]
        if shape == CYLINDER_Y:
            qx, qy = math.sqrt(px * px + pz * pz) - row[6] + r, abs(py) - row[7] + r
        else:
            qx, qy = math.sqrt(px * px + py * py) - row[6] + r, abs(pz) - row[7] + r
        ox, oy = max(qx, 0.0), max(qy, 0.0)
        return math.sqrt(ox * ox + oy * oy) + min(max(qx, qy), 0.0) - r
    if shape == TORUS_Z:
        q = math.sqrt(px * px + py * py) - row[6]
        return math.sqrt(q * q + pz * pz) - row[7]
    q = math.sqrt(px * px + pz * pz) - row[6]  # TORUS_Y
    return math.sqrt(q * q + py * py) - row[7]


@njit(cache=True)
def distance(parts, x, y, z):
    """(distance, material) of the toy at a point; body parts are blended, the others sit on them."""
    body, other, material = 1e9, 1e9, BODY
    for i in range(parts.shape[0]):
        d = _part(parts[i], x, y, z)
        if parts[i, 1] == BODY:
            h = max(_BLEND - abs(body - d), 0.0) / _BLEND
            body = min(body, d) - h * h * _BLEND * 0.25
        elif d < other:
            other = d
            material = int(parts[i, 1])
    if body <= other:
        return body, BODY
    return other, material


@njit(cache=True)
def _trace(parts, ox, oy, oz, dx, dy, dz):
    """Distance along a ray to the toy, or -1. Only the stretch inside the toy's bounding cylinder is walked."""
    a = dx * dx + dz * dz
    b = ox * dx + oz * dz
    c = ox * ox + oz * oz - _RADIUS * _RADIUS
    disc = b * b - a * c
    if disc <= 0.0:
        return -1.0
    root = math.sqrt(disc)
    t, far = max(0.0, (-b - root) / a), (-b + root) / a
    if abs(dy) > 1e-9:
        t0, t1 = -oy / dy, (_TOP - oy) / dy
        t, far = max(t, min(t0, t1)), min(far, max(t0, t1))
    for _ in range(64):
        if t > far:
            return -1.0
        d, _m = distance(parts, ox + t * dx, oy + t * dy, oz + t * dz)
        if d < 0.002:
            return t
        t += 0.92 * d
    return t


@njit(cache=True)
def _shadow(parts, ox, oy, oz, lx, ly, lz):
    """How much of the light reaches a point of the ground, in [0, 1], with a soft edge (Quilez, soft shadows)."""
    light, t = 1.0, 0.03
    for _ in range(28):
        x, y, z = ox + t * lx, oy + t * ly, oz + t * lz
        if y > _TOP or x * x + z * z > 2.2 * _RADIUS * _RADIUS:
            break
        d, _m = distance(parts, x, y, z)
        light = min(light, 7.0 * d / t)
        if light < 0.01:
            return 0.0
        t += min(0.25, max(0.03, d))
    return light * light * (3.0 - 2.0 * light)


@njit(cache=True)
def _patterned(pattern, x, y, z):
    """Whether the pattern paints this point of the body in the accent colour."""
    if pattern == 1:  # spotted: balls on a body-centred lattice, cut by the surface
        for shift in (0.0, 0.5):
            u, v, w = x / 0.52 + 0.3 + shift, y / 0.52 + 0.1 + shift, z / 0.52 + 0.5 + shift
            u, v, w = u - math.floor(u) - 0.5, v - math.floor(v) - 0.5, w - math.floor(w) - 0.5
            if u * u + v * v + w * w < 0.105:
                return True
        return False
    if pattern == 2:  # striped
        return math.sin(2.0 * math.pi * (x * 0.8 + y * 0.6) / 0.44) > 0.15
    if pattern == 3:  # patched: about as much of the body as spots cover, in large, irregular areas
        u = math.sin(7.1 * x + 2.0 * math.sin(5.3 * y + 0.7)) + math.sin(6.3 * y + 2.0 * math.sin(4.9 * z + 1.9))
        return u + math.sin(5.7 * z + 2.0 * math.sin(6.1 * x + 4.2)) > 0.3
    return False


@njit(cache=True)
def _camera(azimuth, elevation):
    """The camera's directions, forward, right and up, as nine numbers.

    The toy looks along +x; at azimuth 0 the camera stands at +z and sees it from the side.
    """
    ca, sa, ce, se = math.cos(azimuth), math.sin(azimuth), math.cos(elevation), math.sin(elevation)
    return -sa * ce, -se, -ca * ce, ca, 0.0, -sa, -sa * se, ce, -ca * se


@njit(cache=True)
def silhouette(parts, view, size, supersample):
    """The share of each pixel's rays that meet the toy, (size, size) uint8; the arguments are those of `render`."""
    azimuth, elevation, zoom, shift_x, shift_y = view[:5]
    fx, fy, fz, rx, ry, rz, ux, uy, uz = _camera(azimuth, elevation)
    ox, oy, oz = -_DISTANCE * fx, _LOOK_AT - _DISTANCE * fy, -_DISTANCE * fz
    out = np.empty((size, size), np.uint8)
    n = size * supersample
    for py in range(size):
        for px in range(size):
            met = 0
            for s in range(supersample * supersample):
                u = 2.0 * (px * supersample + s % supersample + 0.5) / n - 1.0
                v = 1.0 - 2.0 * (py * supersample + s // supersample + 0.5) / n
                x, y = (u / zoom + shift_x) * _TAN_HALF_FOV, (v / zoom + shift_y) * _TAN_HALF_FOV
                dx, dy, dz = fx + x * rx + y * ux, fy + x * ry + y * uy, fz + x * rz + y * uz
                norm = 1.0 / math.sqrt(dx * dx + dy * dy + dz * dz)
                if _trace(parts, ox, oy, oz, dx * norm, dy * norm, dz * norm) >= 0.0:
                    met += 1
            out[py, px] = int(255.0 * met / (supersample * supersample) + 0.5)
    return out


@njit(cache=True, nogil=True)
def render(parts, body, accent, pattern, scene, view, size, supersample):
    """A photograph, (size, size, 3) uint8.

    view: azimuth, elevation (radians), zoom, shift x, shift y, light azimuth, light elevation, horizon, phase.
    """
    azimuth, elevation, zoom, shift_x, shift_y, light_az, light_el, horizon, phase = view
    fx, fy, fz, rx, ry, rz, ux, uy, uz = _camera(azimuth, elevation)
    ox, oy, oz = -_DISTANCE * fx, _LOOK_AT - _DISTANCE * fy, -_DISTANCE * fz
    # Light from behind the camera, turned to a side.
    la = azimuth + light_az
    lx, ly, lz = math.sin(la) * math.cos(light_el), math.sin(light_el), math.cos(la) * math.cos(light_el)
    hx, hy, hz = lx - fx, ly - fy, lz - fz
    hn = 1.0 / math.sqrt(hx * hx + hy * hy + hz * hz)
    hx, hy, hz = hx * hn, hy * hn, hz * hn

    out = np.empty((size, size, 3), np.uint8)
    back = np.zeros(3)
    tint = np.zeros(3)
    rgb = np.zeros(3)
    n = size * supersample
    for py in range(size):
        for px in range(size):
            r_sum, g_sum, b_sum = 0.0, 0.0, 0.0
            for s in range(supersample * supersample):
                u = 2.0 * (px * supersample + s % supersample + 0.5) / n - 1.0
                v = 1.0 - 2.0 * (py * supersample + s // supersample + 0.5) / n
                ambient, key, ground_shadow = backdrop(scene, u, v, horizon, phase, back, tint)
                x, y = (u / zoom + shift_x) * _TAN_HALF_FOV, (v / zoom + shift_y) * _TAN_HALF_FOV
                dx, dy, dz = fx + x * rx + y * ux, fy + x * ry + y * uy, fz + x * rz + y * uz
                norm = 1.0 / math.sqrt(dx * dx + dy * dy + dz * dz)
                dx, dy, dz = dx * norm, dy * norm, dz * norm
                t = _trace(parts, ox, oy, oz, dx, dy, dz)
                if t < 0.0:
                    shade = 1.0
                    if v < horizon and dy < 0.0:
                        t = -oy / dy
                        gx, gz = ox + t * dx, oz + t * dz
                        if gx * gx + gz * gz < 9.0:
                            lit = _shadow(parts, gx, 0.0, gz, lx, ly, lz)
                            shade = 1.0 - ground_shadow * (1.0 - lit)
                    r_sum += back[0] * shade
                    g_sum += back[1] * shade
                    b_sum += back[2] * shade
                    continue
                x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
                d, material = distance(parts, x, y, z)
                e = 0.004
                d1, _m = distance(parts, x + e, y - e, z - e)
                d2, _m = distance(parts, x - e, y - e, z + e)
                d3, _m = distance(parts, x - e, y + e, z - e)
                d4, _m = distance(parts, x + e, y + e, z + e)
                nx, ny, nz = d1 - d2 - d3 + d4, -d1 - d2 + d3 + d4, -d1 + d2 - d3 + d4
                norm = 1.0 / (math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-12)
                nx, ny, nz = nx * norm, ny * norm, nz * norm
                gloss = 0.16
                if material == BODY:
                    if _patterned(pattern, x, y, z):
                        rgb[:] = accent
                    else:
                        rgb[:] = body
                elif material == ACCENT:
                    rgb[:] = accent
                elif material == BLACK:
                    rgb[0], rgb[1], rgb[2] = 0.06, 0.06, 0.07
                    gloss = 0.3
                elif material == EYE:
                    rgb[0], rgb[1], rgb[2] = 0.75, 0.95, 0.85
                elif material == GLASS:
                    rgb[0], rgb[1], rgb[2] = 0.40, 0.62, 0.75
                    gloss = 0.4
                elif material == LAMP:
                    rgb[0], rgb[1], rgb[2] = 1.0, 0.96, 0.75
                else:
                    rgb[0], rgb[1], rgb[2] = 0.98, 0.62, 0.08
                # Half-Lambert keeps the dark side readable; one distance sample ahead darkens creases.
                lambert = 0.5 + 0.5 * (nx * lx + ny * ly + nz * lz)
                a, _m = distance(parts, x + 0.12 * nx, y + 0.12 * ny, z + 0.12 * nz)
                crease = 0.55 + 0.45 * min(1.0, max(0.0, min(a, y + 0.12 * ny) / 0.12))
                brightness = (ambient * (0.75 + 0.25 * ny) + key * lambert * lambert) * crease
                spec = gloss * max(0.0, nx * hx + ny * hy + nz * hz) ** 24
                r_sum += min(1.0, rgb[0] * brightness * tint[0] + spec)
                g_sum += min(1.0, rgb[1] * brightness * tint[1] + spec)
                b_sum += min(1.0, rgb[2] * brightness * tint[2] + spec)
            k = 255.0 / (supersample * supersample)
            out[py, px, 0] = int(r_sum * k + 0.5)
            out[py, px, 1] = int(g_sum * k + 0.5)
            out[py, px, 2] = int(b_sum * k + 0.5)
    return out
