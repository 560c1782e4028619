//! Dates and times of day in UTC, for the log and the real-time clock.
//!
//! Only what those two need: a start reads no time zones, and carries no library that could.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

const DAY_S: i64 = 86_400;
/// Days from 1 March of the year 0 to 1 January 1970 (proleptic Gregorian calendar).
const EPOCH_DAYS: i64 = 719_468;
/// Days in 400 years, after which the calendar repeats.
const ERA_DAYS: i64 = 146_097;

/// A second in UTC, in the proleptic Gregorian calendar, without leap seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Civil {
    /// Astronomical year: 0 is 1 BC.
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
}

impl Civil {
    /// The second that is `seconds` after (before) 1970.
    pub fn from_seconds(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(DAY_S), seconds.rem_euclid(DAY_S));
        // Years that begin in March have their leap day at the end; months have 153 days in five from there.
        let days = days + EPOCH_DAYS;
        let (era, day_of_era) = (days.div_euclid(ERA_DAYS), days.rem_euclid(ERA_DAYS));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let months = (5 * day_of_year + 2) / 153;
        let month = if months < 10 { months + 3 } else { months - 9 };
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * months + 2) / 5 + 1) as u8,
            hour: (rest / 3_600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    /// Seconds since 1970.
    pub fn to_seconds(self) -> i64 {
        let month = i64::from(self.month);
        let year = self.year - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let months = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * months + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * ERA_DAYS + day_of_era - EPOCH_DAYS;
        days * DAY_S + i64::from(self.hour) * 3_600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// 1 is Sunday, 7 is Saturday.
    pub fn weekday(self) -> u8 {
        ((self.to_seconds().div_euclid(DAY_S) + 4).rem_euclid(7) + 1) as u8
    }
}

/// Days of a month.
pub fn days_in_month(year: i64, month: u8) -> u8 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 => 28 + u8::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// RFC 3339 without the time zone: `2026-11-25T21:58:07`.
impl fmt::Display for Civil {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { year, month, day, hour, minute, second } = self;
        write!(formatter, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
    }
}

/// The host's time: the second, and nanoseconds of it.
pub fn now() -> (i64, u32) {
    // A host whose clock is before 1970 is taken to be at its start.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (since.as_secs().cast_signed(), since.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_second_is_what_a_library_of_time_says(seconds in -370_000_000_000_i64..250_000_000_000) {
            let civil = Civil::from_seconds(seconds);
            let other = jiff::Timestamp::from_second(seconds).unwrap().to_zoned(jiff::tz::TimeZone::UTC);
            prop_assert_eq!(civil.to_seconds(), seconds);
            prop_assert_eq!(
                (civil.year, civil.month.cast_signed(), civil.day.cast_signed()),
                (i64::from(other.year()), other.month(), other.day())
            );
            prop_assert_eq!(
                (civil.hour.cast_signed(), civil.minute.cast_signed(), civil.second.cast_signed()),
                (other.hour(), other.minute(), other.second())
            );
            prop_assert_eq!(civil.weekday().cast_signed(), other.weekday().to_sunday_one_offset());
            prop_assert_eq!(days_in_month(civil.year, civil.month).cast_signed(), other.days_in_month());
            if civil.year >= 0 {
                prop_assert_eq!(format!("{civil}Z"), other.timestamp().to_string());
            }
        }
    }
}
