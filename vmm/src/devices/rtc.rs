//! The real-time clock of a PC, an MC146818 with its CMOS memory, at ports 0x70 (index) and 0x71 (data).
//!
//! It tells the host's time in UTC. A guest that sets it gets a clock of its own that runs on from there, as on a real board. There are no
//! alarms and no periodic interrupts: they are not declared, and their enable bits stay 0.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::bus::BusDevice;
use crate::civil::{self, Civil};
use crate::snapshot::{DeviceState, StateError, Stateful};

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Not the chip's: where PCs keep the century (FADT `CENTURY`).
pub const CENTURY: u8 = 0x32;

/// Status A: 32,768 Hz time base, 1,024 Hz; no update is ever in progress.
const A_DEFAULT: u8 = 0x26;
/// Status B: the clock stands and can be set.
const B_SET: u8 = 0x80;
/// Status B: binary numbers, not BCD.
const B_BINARY: u8 = 0x04;
/// Status B: 24 hours.
const B_24_HOURS: u8 = 0x02;
/// Status D: time and memory are valid.
const D_VALID: u8 = 0x80;
/// Hours: afternoon, in the 12-hour format.
const PM: u8 = 0x80;
const MEMORY: usize = 128;
/// Seconds since 1970 of the years 0 to 9999.
const YEARS: RangeInclusive<i64> = -62_167_219_200..=253_402_300_799;

/// The clock.
pub struct Rtc {
    /// Seconds since 1970 on the host.
    now: fn() -> i64,
    state: RtcState,
}

/// The clock in a snapshot. What it tells after a load is the host's time then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RtcState {
    index: u8,
    status_a: u8,
    status_b: u8,
    /// The guest's time less the host's, in seconds.
    offset_s: i64,
    /// The time that stands still while [`B_SET`] is set, in seconds since 1970.
    stands_at: Option<i64>,
    /// The day that was written while the clock stands: the month that has it may come later.
    wanted_day: Option<u8>,
    /// CMOS memory and alarm registers; places of other registers are unused.
    memory: Vec<u8>,
}

impl Rtc {
    /// Number of ports.
    pub const PORTS: u64 = 2;

    /// Tells `now`, in seconds since 1970.
    pub fn new(now: fn() -> i64) -> Self {
        let state = RtcState {
            index: 0,
            status_a: A_DEFAULT,
            status_b: B_24_HOURS,
            offset_s: 0,
            stands_at: None,
            wanted_day: None,
            memory: vec![0; MEMORY],
        };
        Self { now, state }
    }

    /// What the clock tells.
    fn time(&self) -> Civil {
        let seconds =
            self.state.stands_at.unwrap_or_else(|| (self.now)().saturating_add(self.state.offset_s));
        // The registers can't tell other years: a guest that went there gets 1970.
        Civil::from_seconds(if YEARS.contains(&seconds) { seconds } else { 0 })
    }

    fn number(&self, value: u8) -> u8 {
        if self.state.status_b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    /// The number that a guest means; nonsense in BCD is some number, too.
    fn meant(&self, value: u8) -> u8 {
        if self.state.status_b & B_BINARY != 0 {
            value
        } else {
            (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf)
        }
    }

    fn hours(&self, hour: u8) -> u8 {
        if self.state.status_b & B_24_HOURS != 0 {
            return self.number(hour);
        }
        let (half, hour) = (if hour >= 12 { PM } else { 0 }, (hour + 11) % 12 + 1);
        self.number(hour) | half
    }

    fn meant_hours(&self, value: u8) -> u8 {
        if self.state.status_b & B_24_HOURS != 0 {
            return self.meant(value);
        }
        let hour = self.meant(value & !PM) % 12;
        if value & PM != 0 { hour + 12 } else { hour }
    }

    fn read_register(&self) -> u8 {
        let time = self.time();
        let low = |number: i64| self.number(number.rem_euclid(100) as u8);
        match self.state.index {
            SECONDS => self.number(time.second),
            MINUTES => self.number(time.minute),
            HOURS => self.hours(time.hour),
            DAY_OF_WEEK => self.number(time.weekday()),
            DAY => self.number(time.day),
            MONTH => self.number(time.month),
            YEAR => low(time.year),
            CENTURY => low(time.year.div_euclid(100)),
            STATUS_A => self.state.status_a,
            STATUS_B => self.state.status_b,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            other => self.state.memory[usize::from(other)],
        }
    }

    fn write_register(&mut self, value: u8) {
        match self.state.index {
            // The day of the week follows from the date.
            DAY_OF_WEEK | STATUS_C | STATUS_D => {}
            index @ (SECONDS | MINUTES | HOURS | DAY | MONTH | YEAR | CENTURY) => self.set_time(index, value),
            // The divider is the time base's; UIP is read-only.
            STATUS_A => self.state.status_a = value & 0x7f,
            STATUS_B => {
                let was_set = self.state.status_b & B_SET != 0;
                self.state.status_b = value & (B_SET | B_BINARY | B_24_HOURS);
                let is_set = value & B_SET != 0;
                if is_set && !was_set {
                    self.state.stands_at = Some((self.now)().saturating_add(self.state.offset_s));
                } else if let Some(at) = self.state.stands_at.filter(|_| !is_set) {
                    self.state.offset_s = at.saturating_sub((self.now)());
                    (self.state.stands_at, self.state.wanted_day) = (None, None);
                }
            }
            other => self.state.memory[usize::from(other)] = value,
        }
    }

    /// Replaces one part of the time. A day that the month doesn't have becomes its last; other nonsense is ignored.
    fn set_time(&mut self, index: u8, value: u8) {
        let mut time = self.time();
        let number = self.meant(value);
        let wanted_day = self.state.wanted_day.unwrap_or(time.day);
        let mut elsewhere = 0;
        let part = match index {
            SECONDS => &mut time.second,
            MINUTES => &mut time.minute,
            HOURS => &mut time.hour,
            DAY => &mut time.day,
            MONTH => &mut time.month,
            _ => &mut elsewhere,
        };
        *part = if index == HOURS { self.meant_hours(value) } else { number };
        match index {
            DAY if self.state.stands_at.is_some() => self.state.wanted_day = Some(number),
            YEAR => time.year = time.year.div_euclid(100) * 100 + i64::from(number),
            CENTURY => time.year = i64::from(number) * 100 + time.year.rem_euclid(100),
            _ => {}
        }
        let sensible = (0..=9999).contains(&time.year)
            && (1..=12).contains(&time.month)
            && time.hour < 24
            && time.minute < 60
            && time.second < 60;
        if !sensible {
            return;
        }
        if matches!(index, DAY | MONTH | YEAR | CENTURY) {
            let day = if index == DAY { number } else { wanted_day };
            time.day = day.clamp(1, civil::days_in_month(time.year, time.month));
        }
        let wanted = time.to_seconds();
        match &mut self.state.stands_at {
            Some(at) => *at = wanted,
            None => self.state.offset_s = wanted.saturating_sub((self.now)()),
        }
    }
}

/// The host's time.
pub fn host_time() -> i64 {
    civil::now().0
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The index can't be read on a PC.
        data.fill(0xff);
        if let (1, [value]) = (offset, data) {
            *value = self.read_register();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            // The highest bit masks the NMI, which there is none of.
            0 => self.state.index = value & 0x7f,
            1 => self.write_register(value),
            _ => {}
        }
    }
}

impl Stateful for Rtc {
    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&self.state)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let state: RtcState = state.get()?;
        if state.memory.len() != MEMORY || usize::from(state.index) >= MEMORY {
            return Err(StateError::new("its memory has another size"));
        }
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use proptest::prelude::*;

    use super::*;

    /// 2026-11-25 21:58:07 UTC, a Wednesday.
    const NOW: i64 = 1_795_643_887;

    fn get(rtc: &mut Rtc, index: u8) -> u8 {
        let mut value = [0];
        rtc.write(0, &[index]);
        rtc.read(1, &mut value);
        value[0]
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    fn all(rtc: &mut Rtc) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, DAY_OF_WEEK].map(|index| get(rtc, index))
    }

    #[test]
    fn the_time_is_told_in_bcd_and_on_request_in_binary() {
        let mut rtc = Rtc::new(|| NOW);
        assert_eq!(all(&mut rtc), [0x20, 0x26, 0x11, 0x25, 0x21, 0x58, 0x07, 4]);
        set(&mut rtc, STATUS_B, B_BINARY | B_24_HOURS);
        assert_eq!(all(&mut rtc), [20, 26, 11, 25, 21, 58, 7, 4]);
        set(&mut rtc, STATUS_B, 0);
        assert_eq!(get(&mut rtc, HOURS), 0x09 | PM);
        assert_eq!((get(&mut rtc, STATUS_A) & 0x80, get(&mut rtc, STATUS_D)), (0, D_VALID));
    }

    #[test]
    fn midnight_and_noon_are_twelve_in_the_short_format() {
        let mut rtc = Rtc::new(|| NOW);
        set(&mut rtc, STATUS_B, B_BINARY);
        for (hour, shown) in [(0, 12), (1, 1), (11, 11), (12, 12 | PM), (13, 1 | PM), (23, 11 | PM)] {
            assert_eq!(rtc.hours(hour), shown);
            assert_eq!(rtc.meant_hours(shown), hour);
        }
    }

    #[test]
    fn a_clock_that_is_set_stands_and_then_runs_on_from_there() {
        static HOST: AtomicI64 = AtomicI64::new(NOW);
        let mut rtc = Rtc::new(|| HOST.load(Ordering::Relaxed));
        set(&mut rtc, STATUS_B, B_SET | B_24_HOURS);
        // From the 25th of November to the 29th of February of a leap year, the day first.
        for (index, value) in
            [(DAY, 0x29), (MONTH, 0x02), (YEAR, 0x28), (HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x58)]
        {
            set(&mut rtc, index, value);
        }
        HOST.store(NOW + 100, Ordering::Relaxed);
        let stands = [0x20, 0x28, 0x02, 0x29, 0x23, 0x59, 0x58, 3];
        assert_eq!(all(&mut rtc), stands);
        set(&mut rtc, STATUS_B, B_24_HOURS);
        HOST.store(NOW + 103, Ordering::Relaxed);
        let runs = [0x20, 0x28, 0x03, 0x01, 0, 0, 0x01, 4];
        assert_eq!(all(&mut rtc), runs);
        // And in another process.
        let mut loaded = Rtc::new(|| HOST.load(Ordering::Relaxed));
        loaded.restore(&rtc.save().unwrap()).unwrap();
        assert_eq!(all(&mut loaded), runs);
    }

    #[test]
    fn memory_is_kept_and_interrupts_cannot_be_enabled() {
        let mut rtc = Rtc::new(|| NOW);
        set(&mut rtc, 0x7f, 0xa5);
        set(&mut rtc, 0x80 | 0x40, 7);
        assert_eq!((get(&mut rtc, 0x7f), get(&mut rtc, 0x40)), (0xa5, 7));
        set(&mut rtc, STATUS_B, 0x70 | B_24_HOURS);
        assert_eq!(get(&mut rtc, STATUS_B), B_24_HOURS);
        let mut wide = [0; 4];
        rtc.read(1, &mut wide);
        assert_eq!(wide, [0xff; 4]);
    }

    proptest! {
        #[test]
        fn whatever_is_written_every_register_can_be_read(
            writes in proptest::collection::vec((0_u64..3, any::<u8>()), 0..64), host in any::<i64>(),
        ) {
            static HOST: AtomicI64 = AtomicI64::new(0);
            HOST.store(host, Ordering::Relaxed);
            let mut rtc = Rtc::new(|| HOST.load(Ordering::Relaxed));
            for (offset, value) in writes {
                rtc.write(offset, &[value]);
            }
            for index in 0..128 {
                get(&mut rtc, index);
            }
        }
    }
}
