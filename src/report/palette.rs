//! Colours. Categories use the Okabe–Ito set (safe for the common kinds of colour blindness), values a viridis ramp or
//! a blue–orange one.

use std::fmt::Write as _;

/// A colour, 8 bits a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rgb(
    /// Red.
    pub u8,
    /// Green.
    pub u8,
    /// Blue.
    pub u8,
);

impl Rgb {
    const fn hex(rgb: u32) -> Self {
        Self((rgb >> 16) as u8, (rgb >> 8) as u8, rgb as u8)
    }

    /// The colour `share` of the way to `other`.
    pub fn mix(self, other: Self, share: f64) -> Self {
        let channel = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * share).round() as u8;
        Self(channel(self.0, other.0), channel(self.1, other.1), channel(self.2, other.2))
    }
}

impl std::fmt::Display for Rgb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "#{:02x}{:02x}{:02x}", self.0, self.1, self.2)
    }
}

/// What something is drawn in: neutral roles, and colours of categories.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Tone {
    /// Text and outlines.
    #[default]
    Ink,
    /// Secondary text.
    Muted,
    /// Grid lines and empty cells.
    Line,
    /// The background.
    Paper,
    /// A category.
    Blue,
    /// A category.
    Vermilion,
    /// A category.
    Green,
    /// A category.
    Pink,
    /// A category.
    Sky,
    /// A category.
    Amber,
    /// A neutral category, for what others are compared with.
    Grey,
}

impl Tone {
    /// The colours of categories, in the order in which unnamed categories should take them.
    pub const CATEGORIES: [Self; 7] =
        [Self::Blue, Self::Vermilion, Self::Green, Self::Pink, Self::Sky, Self::Amber, Self::Grey];

    const ALL: [Self; 11] = [
        Self::Ink,
        Self::Muted,
        Self::Line,
        Self::Paper,
        Self::Blue,
        Self::Vermilion,
        Self::Green,
        Self::Pink,
        Self::Sky,
        Self::Amber,
        Self::Grey,
    ];

    /// Its name in class names: `f-blue` fills, `s-blue` strokes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ink => "ink",
            Self::Muted => "muted",
            Self::Line => "line",
            Self::Paper => "paper",
            Self::Blue => "blue",
            Self::Vermilion => "vermilion",
            Self::Green => "green",
            Self::Pink => "pink",
            Self::Sky => "sky",
            Self::Amber => "amber",
            Self::Grey => "grey",
        }
    }

    /// On a light background.
    pub fn light(self) -> Rgb {
        Rgb::hex(match self {
            Self::Ink => 0x1d2329,
            Self::Muted => 0x59636e,
            Self::Line => 0xdfe3e8,
            Self::Paper => 0xffffff,
            Self::Blue => 0x0072b2,
            Self::Vermilion => 0xd55e00,
            Self::Green => 0x009e73,
            Self::Pink => 0xb9608f,
            Self::Sky => 0x56b4e9,
            Self::Amber => 0xe0a100,
            Self::Grey => 0x8a939c,
        })
    }

    /// On a dark background.
    pub fn dark(self) -> Rgb {
        Rgb::hex(match self {
            Self::Ink => 0xe8eaed,
            Self::Muted => 0x9ca6b0,
            Self::Line => 0x333a42,
            Self::Paper => 0x1a1e23,
            Self::Blue => 0x3fa3e0,
            Self::Vermilion => 0xf0803c,
            Self::Green => 0x2cc296,
            Self::Pink => 0xdd8fb8,
            Self::Sky => 0x8fd0f5,
            Self::Amber => 0xf0bf45,
            Self::Grey => 0x828c96,
        })
    }

    /// Rules that recolour drawings on a dark page; the light colours are attributes of the drawings themselves.
    pub(crate) fn dark_css() -> String {
        let mut css = String::new();
        for tone in Self::ALL {
            let (name, color) = (tone.name(), tone.dark());
            // Writing to a String cannot fail.
            let _ = write!(css, ".f-{name}{{fill:{color}}}.s-{name}{{stroke:{color}}}.b-{name}{{--tone:{color}}}");
        }
        css
    }

    /// Rules that give highlight tiles their tone on a light page.
    pub(crate) fn tile_css() -> String {
        Self::ALL.iter().map(|tone| format!(".b-{}{{--tone:{}}}", tone.name(), tone.light())).collect()
    }
}

/// How a value becomes a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ramp {
    /// Viridis: dark = low, bright = high; even in lightness, safe for colour blindness.
    Sequential,
    /// Blue below the middle of the range, near white at it, orange above.
    Diverging,
    /// How much of something is there, from 0 to 1: pale to full blue.
    Share,
}

const VIRIDIS: [u32; 11] =
    [0x440154, 0x482475, 0x414487, 0x355f8d, 0x2a788e, 0x21918c, 0x22a884, 0x44bf70, 0x7ad151, 0xbddf26, 0xfde725];
const BLUE_ORANGE: [u32; 9] =
    [0x0b4884, 0x2f78b7, 0x76add6, 0xbcd8ec, 0xf4f2ee, 0xfad3ad, 0xf0a15e, 0xd2691e, 0x8f3d06];
/// Opacity of a share of 0, so that an empty cell can still be seen.
const FAINTEST_SHARE: f64 = 0.10;

impl Ramp {
    /// The colour and its opacity at `t` from 0 (low end) to 1 (high end); outside it is held at the ends.
    pub fn color(self, t: f64) -> (Rgb, f64) {
        let t = if t.is_finite() { t.clamp(0.0, 1.0) } else { 0.0 };
        let between = |stops: &[u32]| {
            let place = t * (stops.len() - 1) as f64;
            let low = (place as usize).min(stops.len() - 2);
            Rgb::hex(stops[low]).mix(Rgb::hex(stops[low + 1]), place - low as f64)
        };
        match self {
            Self::Sequential => (between(&VIRIDIS), 1.0),
            Self::Diverging => (between(&BLUE_ORANGE), 1.0),
            Self::Share => (Tone::Blue.light(), FAINTEST_SHARE + (1.0 - FAINTEST_SHARE) * t),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance (WCAG 2.1).
    fn luminance(c: Rgb) -> f64 {
        let linear = |v: u8| {
            let v = f64::from(v) / 255.0;
            if v <= 0.04045 { v / 12.92 } else { ((v + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * linear(c.0) + 0.7152 * linear(c.1) + 0.0722 * linear(c.2)
    }

    #[test]
    fn lightness_of_viridis_rises_and_of_blue_orange_peaks_in_the_middle() {
        let at = |ramp: Ramp, i: usize| luminance(ramp.color(i as f64 / 100.0).0);
        for i in 0..100 {
            assert!(at(Ramp::Sequential, i) < at(Ramp::Sequential, i + 1) + 1e-4, "viridis at {i}");
            let (a, b) = (at(Ramp::Diverging, i), at(Ramp::Diverging, i + 1));
            assert!(if i < 50 { a < b } else { a > b }, "blue-orange at {i}: {a} {b}");
        }
    }

    #[test]
    fn text_stands_out_on_both_backgrounds() {
        let contrast = |a: Rgb, b: Rgb| {
            let (a, b) = (luminance(a), luminance(b));
            (a.max(b) + 0.05) / (a.min(b) + 0.05)
        };
        for tone in [Tone::Ink, Tone::Muted] {
            assert!(contrast(tone.light(), Tone::Paper.light()) >= 4.5);
            assert!(contrast(tone.dark(), Tone::Paper.dark()) >= 4.5);
        }
    }

    #[test]
    fn ends_hold() {
        assert_eq!(Ramp::Sequential.color(-3.0), Ramp::Sequential.color(0.0));
        assert_eq!(Ramp::Sequential.color(7.0).0, Rgb::hex(0xfde725));
        assert_eq!(Ramp::Sequential.color(f64::NAN), Ramp::Sequential.color(0.0));
    }
}
