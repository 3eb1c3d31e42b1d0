//! Colours. Categories use the Okabe–Ito set, values the viridis ramp: both can be told apart by people with the common
//! kinds of colour blindness.

use serde::Serialize;

/// A colour: red, green, blue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rgb(u8, u8, u8);

impl Rgb {
    const fn hex(rgb: u32) -> Self {
        Self((rgb >> 16) as u8, (rgb >> 8) as u8, rgb as u8)
    }

    /// The colour `share` of the way to `other`.
    fn mix(self, other: Self, share: f64) -> Self {
        let channel = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * share).round() as u8;
        Self(channel(self.0, other.0), channel(self.1, other.1), channel(self.2, other.2))
    }
}

impl std::fmt::Display for Rgb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "#{:02x}{:02x}{:02x}", self.0, self.1, self.2)
    }
}

/// A colour by its role, with a value for light and one for dark pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tone {
    /// Text and outlines.
    #[default]
    Ink,
    /// Secondary text.
    Muted,
    /// Grid lines and empty cells.
    Line,
    /// Background.
    Paper,
    /// Category.
    Blue,
    /// Category.
    Vermilion,
    /// Category.
    Green,
    /// Category.
    Pink,
    /// Category.
    Sky,
    /// Category.
    Amber,
    /// Category, for a reference.
    Grey,
}

impl Tone {
    /// In order of declaration: name, colour on light pages, colour on dark pages.
    const ALL: [(Self, &'static str, u32, u32); 11] = [
        (Self::Ink, "ink", 0x1d2329, 0xe8eaed),
        (Self::Muted, "muted", 0x59636e, 0x9ca6b0),
        (Self::Line, "line", 0xdfe3e8, 0x333a42),
        (Self::Paper, "paper", 0xffffff, 0x1a1e23),
        (Self::Blue, "blue", 0x0072b2, 0x3fa3e0),
        (Self::Vermilion, "vermilion", 0xd55e00, 0xf0803c),
        (Self::Green, "green", 0x009e73, 0x2cc296),
        (Self::Pink, "pink", 0xb9608f, 0xdd8fb8),
        (Self::Sky, "sky", 0x56b4e9, 0x8fd0f5),
        (Self::Amber, "amber", 0xe0a100, 0xf0bf45),
        (Self::Grey, "grey", 0x8a939c, 0x828c96),
    ];

    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().map(|tone| tone.0)
    }

    /// As in class names: `f-blue` fills, `s-blue` strokes.
    pub(crate) fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    pub(crate) fn light(self) -> Rgb {
        Rgb::hex(Self::ALL[self as usize].2)
    }

    pub(crate) fn dark(self) -> Rgb {
        Rgb::hex(Self::ALL[self as usize].3)
    }
}

/// Colour scale of a heat map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ramp {
    /// Viridis, dark to bright, over the range of the values.
    #[default]
    Sequential,
    /// Pale to full blue, over 0 to 1.
    Share,
}

const VIRIDIS: [u32; 11] =
    [0x440154, 0x482475, 0x414487, 0x355f8d, 0x2a788e, 0x21918c, 0x22a884, 0x44bf70, 0x7ad151, 0xbddf26, 0xfde725];
/// Opacity of a share of 0, so that an empty cell can still be seen.
const FAINTEST_SHARE: f64 = 0.10;

impl Ramp {
    /// Colour and opacity at `t`, clamped to 0 to 1; NaN counts as 0.
    pub(crate) fn color(self, t: f64) -> (Rgb, f64) {
        let t = if t.is_finite() { t.clamp(0.0, 1.0) } else { 0.0 };
        match self {
            Self::Sequential => {
                let place = t * (VIRIDIS.len() - 1) as f64;
                let low = (place as usize).min(VIRIDIS.len() - 2);
                (Rgb::hex(VIRIDIS[low]).mix(Rgb::hex(VIRIDIS[low + 1]), place - low as f64), 1.0)
            }
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
    fn tones_are_listed_by_declaration() {
        for (i, tone) in Tone::all().enumerate() {
            assert_eq!(tone as usize, i);
            assert_eq!(serde_json::to_value(tone).unwrap(), tone.name());
        }
    }

    #[test]
    fn lightness_of_viridis_rises() {
        let at = |i: usize| luminance(Ramp::Sequential.color(i as f64 / 100.0).0);
        for i in 0..100 {
            assert!(at(i) < at(i + 1) + 1e-4, "at {i}");
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
